"""`job: train` with `task: classify`: a network for images, trained as language models are."""
