"""The same faults done to Tunesmith, the Hugging Face Trainer and TRL."""
