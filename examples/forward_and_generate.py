"""Run the reference forward pass on a checkpoint or a GGUF file of any type, and continue a prompt.

Usage: python examples/forward_and_generate.py [MODEL [PROMPT]]
"""

import sys
from pathlib import Path

from bamba_quant.embedded import embedded_model
from bamba_quant.inference.loading import load_model_and_tokenizer
from bamba_reference.runtime.generate import Sampling, generate
from bamba_reference.torch.forward import forward, load

model_path = Path(sys.argv[1]) if len(sys.argv) > 1 else embedded_model()
prompt = sys.argv[2] if len(sys.argv) > 2 else "The function"

# `loaded.weights` is a mapping that reads a tensor when it is looked up; `load` reads all of them into torch tensors.
loaded, encoder = load_model_and_tokenizer(model_path)
model = load(loaded.config, loaded.weights)
tokens = encoder.encode(prompt)

logits = forward(model, [tokens]).logits  # (1, tokens, vocabulary)
best = logits[0, -1].topk(5)
for probability, token in zip(logits[0, -1].softmax(-1)[best.indices], best.indices, strict=True):
    print(f"{probability:.3f} {encoder.decode([*tokens, int(token)])!r}")

new = list(generate(model, tokens, max_new_tokens=20, sampling=Sampling(temperature=0.8, top_p=0.95, seed=1)))
print(encoder.decode(tokens + new))
