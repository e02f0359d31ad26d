"""Meshes, placements and plans: tensor, expert, context, data and pipeline parallelism around the core."""
