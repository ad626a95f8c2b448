"""What is believed of models beforehand: recipes, objectives, levels of effort."""
