"""Where datasets come from, their formats, the split, the leak check, augmentation, batches."""
