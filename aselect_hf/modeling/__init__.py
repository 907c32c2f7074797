"""Everything a checkpoint carries to the Hub: one flat folder that imports only itself, torch and transformers."""
