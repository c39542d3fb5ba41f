"""The kinds of training: a captioner, a CLAP, a language model."""
