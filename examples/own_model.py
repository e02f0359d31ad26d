"""trimtab.MoE in a model of one's own, balanced by an expert bias and a small sequence-wise loss."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trimtab

DIM, VOCAB, STEPS = 32, 64, 60


class Block(nn.Module):
    """A causal mixing of neighbours in place of attention, then an MoE layer."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(DIM, DIM, kernel_size=4)
        self.norm = nn.RMSNorm(DIM)
        self.moe = trimtab.MoE.Config(
            router=trimtab.Router.Config(
                dim=DIM, num_experts=8, top_k=2, score="sigmoid", normalize_top_k=True, expert_bias=True
            ),
            experts=trimtab.Experts.Config(dim=DIM, hidden_dim=32, num_experts=8),
            shared_experts=trimtab.SharedExperts.Config(dim=DIM, hidden_dim=32),
        ).build()

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = x_BSD + self.mix(F.pad(x_BSD.transpose(1, 2), (3, 0))).transpose(1, 2)
        return x_BSD + self.moe(self.norm(x_BSD))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(DIM, VOCAB)

    # The name input_ids and the 2-D attention_mask tell the balancer what the batch is.
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(self.blocks(self.embed(input_ids)))


torch.manual_seed(0)
model = Model()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
balancer = trimtab.attach(
    model,
    [trimtab.SequenceWise.Config(coef=1e-4, assignments="unbiased")],
    # 1e-3 is the published speed for long runs; 60 steps need a faster one that falls at the end.
    bias=trimtab.Sign.Config(speed=1e-2, schedule=((0, 1.0), (40, 1.0), (60, 0.1))),
)

for step in range(1, STEPS + 1):
    start, stride = torch.randint(VOCAB, (8, 1)), torch.randint(1, 4, (8, 1))
    tokens = (start + stride * torch.arange(65)) % VOCAB
    logits = model(tokens[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    balancer.step()
    if step % 20 == 0:
        numbers = balancer.metrics()
        worst = max(numbers["maxvio"])
        print(f"step {step:3d}  loss {loss.item():.3f}  worst maxvio {worst:.2f}  bias {numbers['bias_max']}")
