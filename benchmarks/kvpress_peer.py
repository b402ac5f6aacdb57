"""kvpress scores given tokens: prompts compressed by its SnapKV, the rest replayed one by one.

    python -P kvpress_peer.py MODEL_FOLDER THREADS

Any Python that has kvpress may run it: it imports nothing of ours. For each line of JSON that it reads, it
writes the logits to the file that the line names.
"""

import importlib.metadata
import json
import os
import sys
from typing import Any


def main() -> None:
    # Libraries write to standard output as they like; the answers have a way of their own.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    try:
        import numpy
        import torch
        import transformers
        from kvpress import SnapKVPress
    except ImportError as error:
        return answer({"cannot": f"{error}; pip install kvpress"})
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(int(sys.argv[2]))
    torch.set_grad_enabled(False)
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    model.eval()
    answer({"kvpress": importlib.metadata.version("kvpress")})
    for line in sys.stdin:
        asked = json.loads(line)
        tokens, length = torch.tensor([asked["tokens"]]), asked["prompt_length"]
        press = SnapKVPress(compression_ratio=max(0.0, 1 - asked["budget"] / length))
        cache = transformers.DynamicCache()
        logits = {}
        with press(model):
            found = model(tokens[:, :length], past_key_values=cache, logits_to_keep=1)
        logits[length - 1] = found.logits[0, -1]
        kept = cache.get_seq_length()
        for position in range(length, tokens.shape[1]):
            found = model(
                tokens[:, position : position + 1],
                past_key_values=cache,
                position_ids=torch.tensor([[position]]),  # its cache is shorter than the text
            )
            logits[position] = found.logits[0, -1]
        numpy.save(asked["file"], torch.stack([logits[i] for i in asked["positions"]]).numpy())
        answer({"kept": kept})


if __name__ == "__main__":
    main()
