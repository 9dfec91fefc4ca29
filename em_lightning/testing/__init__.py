"""Contract tests that authors of new kernels, operators, activations and losses subclass."""
