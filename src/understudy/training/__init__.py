"""Training: text to learn from, a teacher, what is trained, and the run itself, on transformers' Trainer."""
