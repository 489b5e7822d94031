"""What `sfumato doctor` looks at: the machine, its packages, and a model against diffusers and itself."""
