"""Balance a Hugging Face MoE model in an ordinary training loop. No network: the model is tiny and random."""

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import trimtab

M, STEPS = 2, 20  # microbatches per step, steps

torch.manual_seed(0)
config = Qwen3MoeConfig(
    vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, moe_intermediate_size=32, num_experts=16, num_experts_per_tok=2,
)  # fmt: skip
model = AutoModelForCausalLM.from_config(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

objectives = [trimtab.GlobalBatch.Config(coef=1e-2), trimtab.ZLoss.Config(coef=1e-3)]
balancer = trimtab.attach(model, objectives, accumulation=M)

for step in range(1, STEPS + 1):
    for _ in range(M):
        tokens = torch.arange(64).repeat(4, 1) * torch.randint(1, 8, (4, 1)) % config.vocab_size
        loss = model(input_ids=tokens, labels=tokens).loss
        (loss / M).backward()  # gradients of the objectives are added here
    optimizer.step()
    optimizer.zero_grad()
    balancer.step()
    if step % 5 == 0:
        maxvio = max(balancer.metrics()["maxvio"])
        print(f"step {step:3d}  loss {loss.item():.3f}  worst maxvio {maxvio:.2f}")
