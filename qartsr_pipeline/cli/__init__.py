"""What the commands of `qartsr` do; the command line itself is in `qartsr_pipeline.cli.main`."""
