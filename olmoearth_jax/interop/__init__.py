"""Published weights and configs in and out."""
