"""Whether a model that was fine-tuned still answers in the modality that it is asked for."""
