"""The PLM owner's side: serves a language model's representations without giving its weights away."""
