"""Orders in: presets say what a file means, reading finds its records, validation checks them, warehouse.versions keeps them."""
