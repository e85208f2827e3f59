import sys

from distvgg.cli import main

if __name__ == "__main__":
    sys.exit(main())
