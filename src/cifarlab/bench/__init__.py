"""How fast a recipe's training step is here: beside its own ceiling, and beside other loops on the same model."""
