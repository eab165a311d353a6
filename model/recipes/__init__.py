"""What was made once: the tokenizer and the demo's vision encoder."""
