"""How much of the gap to full fine-tuning is the embedding, which adapters on linear layers leave as it is.

    python benchmarks/regret/embedding.py       write benchmarks/regret/embedding.jsonl

In a small model the embedding, which is the head as well, is a tenth of all parameters, and text of another kind has
other tokens. LoRA Without Regret has an adapter on the unembedding, too. Where it is trained here, head and embedding
part.
"""

from common import SEEDS, arms, experiment, record

STEPS = ("train.steps=150", "train.eval_every=150", SEEDS)


def main() -> None:
    """Ranks 16 and 128 with the embedding frozen and trained, full fine-tuning; at the best of two rates; two seeds."""
    rows = arms({"method": "full", "embedding": True}, "train.full_finetune=true", "train.lr=1e-3,2e-3", *STEPS)
    for is_trained in (False, True):
        more = ("lora.also_train=[embed_tokens,lm_head]", "lora.untie_head=true") if is_trained else ()
        settings = ("lora.rank=16,128", "train.lr=2e-3,4e-3", *STEPS, *more)
        rows += arms({"method": "lora", "embedding": is_trained}, *settings)
        record("embedding", rows)


if __name__ == "__main__":
    experiment("embedding", main)
