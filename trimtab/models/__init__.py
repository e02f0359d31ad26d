"""Model families of the trainer: configs and presets."""
