"""What recipes and eval share: arguments, fine-tuning, held-out loss."""
