from jfr2020.cli import main
main()
