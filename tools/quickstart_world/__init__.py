"""The generator of the quickstart's invented world: towns, texts, questions, tokenizer and base model."""
