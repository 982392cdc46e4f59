"""What readers see: collected results, tables, figures, the page, and the plan of a study."""
