"""How far each rule for choosing a timestep is from exhaustive search, over pairs of checkpoint and data."""
