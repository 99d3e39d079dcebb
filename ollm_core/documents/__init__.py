"""The user's documents as text: plain text, Markdown, HTML, PDF and DOCX."""
