"""What irkit shows in a notebook: anywidgets of plain ES modules, each with a static twin."""
