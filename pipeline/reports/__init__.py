"""Reports for people and scripts: `queries` asks the warehouse, `model` holds and computes, `render` draws, `export` writes JSON and CSV."""
