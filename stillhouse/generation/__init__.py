"""Generation: models write instruction data for a target, and judge which of it teaches it most."""
