"""The command line. Importing it loads no torch: a verb imports what it needs when it runs."""
