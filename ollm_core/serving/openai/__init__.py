"""What is asked and answered in OpenAI's words. No network."""
