"""Code that every folder uses: errors, the config, files, flags, the terminal."""
