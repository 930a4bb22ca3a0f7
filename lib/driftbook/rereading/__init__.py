"""Others' published runs, analysed again."""
