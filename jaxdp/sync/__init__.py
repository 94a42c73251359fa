"""How replicas agree on one model, and what that costs."""
