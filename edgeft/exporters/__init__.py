"""From weights to artifacts: merge, write, quantize, verify."""
