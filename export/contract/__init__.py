"""What every part agrees on: geometry, state, layouts and profiles. Standard library only."""
