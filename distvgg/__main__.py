import sys

from distvgg import preemption

if sys.argv[1:2] == ["train"]:
    preemption.install()  # before the slow imports: a signal that comes now must not kill

from distvgg.cli import main

if __name__ == "__main__":
    sys.exit(main())
