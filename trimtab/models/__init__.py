"""Model families of the trainer: one module each, with functions that return whole configurations."""
