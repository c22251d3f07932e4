from jfr2020.cli.main import main
main()
