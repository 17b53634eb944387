"""The commands of `qartsr`, one file each; `qartsr_pipeline.cli.main` lists them and says how heavy imports are delayed."""
