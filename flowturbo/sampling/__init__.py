"""From seed, numbers and conditions to uint8 images."""
