"""How replicas are synchronised, and what that costs."""
