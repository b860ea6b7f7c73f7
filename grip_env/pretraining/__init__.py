"""How the embedded model was made: its parts, the vision stage, the language stage, and their training loop."""
