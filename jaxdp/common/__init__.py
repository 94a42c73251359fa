"""What every wing uses: errors, the config, files, flags, the terminal."""
