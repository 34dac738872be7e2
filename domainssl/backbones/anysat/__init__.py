"""AnySat: images and series of eleven sensors, with patches of any size in metres."""
