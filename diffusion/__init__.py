"""The model's mathematics, shared by sampler and learner."""

import os

# transformers warns at import that image processors lack torchvision; nothing here uses one.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
