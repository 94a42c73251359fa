"""The training step: loss, gradient, optimizer, and the program that XLA compiles of them."""
