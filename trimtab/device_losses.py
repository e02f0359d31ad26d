"""Balance objectives over devices: the second and third losses of DeepSeek-V2.

Shapes: E experts, G finest groups, H groups of one loss, D devices, e experts of one device.
"""

from dataclasses import dataclass

from torch import Tensor

from trimtab.counts import CountMap, DeviceCounts, Reading
from trimtab.losses import SequenceWise
from trimtab.scale import Accumulation


class DeviceLevel(SequenceWise):
    """Device-level balance loss of DeepSeek-V2: sum_d f'_d P'_d of each sequence, averaged over the step.

        f'_d = mean of f_e over the experts of device d,   P'_d = sum of P_e over them,   1.0 at balance

    It is the sequence-wise loss with f replaced by its mean over each device's experts.

    Source: DeepSeek-V2, arXiv:2405.04434, eq. 26-28.
    """

    name: str = "device_level"

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(SequenceWise.Config):
        """Settings of the device-level loss, beside those of `SequenceWise`.

        Args:
            num_devices: D; experts lie on devices in contiguous equal blocks.

        Raises:
            ValueError: fewer than one device.
        """

        num_devices: int

        def __post_init__(self) -> None:
            """Validate."""
            SequenceWise.Config.__post_init__(self)
            if self.num_devices < 1:
                raise ValueError(f"num_devices={self.num_devices} must be at least 1")

        def build(self) -> "DeviceLevel":
            """Return the objective."""
            return DeviceLevel(self)

    config: Config

    def check(self, num_experts: int, top_k: int, accumulation: Accumulation) -> None:
        """Devices must divide the experts."""
        if num_experts % self.config.num_devices:
            raise ValueError(
                f"num_devices={self.config.num_devices} must divide num_experts={num_experts}; "
                f"choose a divisor of {num_experts}"
            )

    def load(self, reading: Reading) -> Tensor:
        """(..., H, E) mean load fraction of each expert's device."""
        load_HE = SequenceWise.load(self, reading)
        num_devices, num_experts = self.config.num_devices, load_HE.shape[-1]
        load_HDe = load_HE.reshape(*load_HE.shape[:-1], num_devices, num_experts // num_devices)
        return load_HDe.mean(dim=-1).repeat_interleave(num_experts // num_devices, dim=-1)


class CommunicationLevel(DeviceLevel):
    """Communication balance loss of DeepSeek-V2: sum_d f''_d P''_d of each sequence, averaged over the step.

        f''_d = D / (m n) * (tokens sent to device d),   P''_d = sum of P_e over its experts

    m is the number of devices a token may reach, so 1.0 when every token reaches m devices evenly.

    Source: DeepSeek-V2, arXiv:2405.04434, eq. 29-31.
    """

    name: str = "communication_level"

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(DeviceLevel.Config):
        """Settings of the communication-level loss, beside those of `DeviceLevel`.

        Args:
            max_devices_per_token: m, the device limit of the router.

        Raises:
            ValueError: m outside 1..num_devices, or unbiased assignments, which are never sent.
        """

        max_devices_per_token: int

        def __post_init__(self) -> None:
            """Validate."""
            DeviceLevel.Config.__post_init__(self)
            if not 1 <= self.max_devices_per_token <= self.num_devices:
                raise ValueError(
                    f"max_devices_per_token={self.max_devices_per_token} must be in "
                    f"[1, num_devices={self.num_devices}]"
                )
            if self.assignments != "executed":
                raise ValueError(
                    f"assignments={self.assignments!r}: communication is what the router executed; "
                    "leave it 'executed'"
                )

        def build(self) -> "CommunicationLevel":
            """Return the objective."""
            return CommunicationLevel(self)

    config: Config

    @property
    def maps(self) -> tuple[CountMap, ...]:
        """Tokens per device."""
        return (DeviceCounts(self.config.num_devices),)

    def load(self, reading: Reading) -> Tensor:
        """(..., H, E) f'' of each expert's device."""
        # A device's count stands at each of its experts, so slots are counted per expert too.
        slots = self.config.max_devices_per_token * reading.num_experts / self.config.num_devices
        return reading.load(self.maps[0], self.config.unit, slots)
