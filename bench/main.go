// Command bench measures replicated logs side by side: the same closed-loop
// clients drive each system in turn, and every figure is set against the pump,
// the least work that makes a payload durable on two of three nodes. README.md
// says how to run it and how the figures are defined. It runs on Linux.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	switch {
	case errors.Is(err, flag.ErrHelp):
	case err != nil:
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// options are the command line's flags, checked.
type options struct {
	systems    []string
	clients    []int
	size       int
	rounds     int
	measure    time.Duration
	warmup     time.Duration
	procs      int
	dir        string
	allowTmpfs bool
	json       string
	cpuprofile string
}

// parseFlags reports every bad flag at once.
func parseFlags(args []string, help io.Writer) (options, error) {
	var o options
	var systems, clients string
	var seconds, warmup float64
	f := flag.NewFlagSet("bench", flag.ContinueOnError)
	f.SetOutput(help)
	f.StringVar(&systems, "systems", "pump,raft", "systems to compare, of "+strings.Join(systemNames(), ", "))
	f.StringVar(&clients, "clients", "1,16,256,1024", "numbers of closed-loop clients")
	f.IntVar(&o.size, "size", 128, "bytes per payload")
	f.IntVar(&o.rounds, "rounds", 9, "rounds per number of clients; every round runs each system once")
	f.Float64Var(&seconds, "seconds", 2, "measured seconds per round and system")
	f.Float64Var(&warmup, "warmup", 0.5, "seconds driven before that and not counted")
	f.IntVar(&o.procs, "procs", 8, "GOMAXPROCS")
	f.StringVar(&o.dir, "dir", "", "where to put the data, on a disk and not in memory (default: a temporary directory)")
	f.BoolVar(&o.allowTmpfs, "allow-tmpfs", false, "measure even where the file system is in memory and syncs cost nothing")
	f.StringVar(&o.json, "json", "", "also write all figures to this file")
	f.StringVar(&o.cpuprofile, "cpuprofile", "", "write a CPU profile of everything that runs to this file")
	if err := f.Parse(args); err != nil {
		return options{}, err
	}
	o.measure = time.Duration(seconds * float64(time.Second))
	o.warmup = time.Duration(warmup * float64(time.Second))

	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if f.NArg() > 0 {
		bad("unexpected argument %q; every setting is a flag, see -h", f.Arg(0))
	}
	for name := range strings.SplitSeq(systems, ",") {
		if _, err := newSystem(name); err != nil {
			bad("-systems: %w", err)
		} else if slices.Contains(o.systems, name) {
			bad("-systems: %q is named twice", name)
		}
		o.systems = append(o.systems, name)
	}
	for field := range strings.SplitSeq(clients, ",") {
		n, err := strconv.Atoi(field)
		if err != nil || n < 1 {
			bad("-clients: %q is not a number of clients; write, for example, 1,16,256", field)
		} else if slices.Contains(o.clients, n) {
			bad("-clients: %d is named twice", n)
		}
		o.clients = append(o.clients, n)
	}
	if o.size < 1 || o.size > pumpMaxRecord {
		bad("-size: %d is not between 1 and %d bytes", o.size, pumpMaxRecord)
	}
	if o.rounds < 1 {
		bad("-rounds: %d; at least 1 is needed, and 9 for a figure to quote", o.rounds)
	}
	if o.measure <= 0 {
		bad("-seconds: %g is not more than 0", seconds)
	}
	if o.warmup < 0 {
		bad("-warmup: %g is less than 0", warmup)
	}
	if o.procs < 1 {
		bad("-procs: %d; GOMAXPROCS is at least 1", o.procs)
	}
	return o, errors.Join(errs...)
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) (err error) {
	o, err := parseFlags(args, stderr)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp(o.dir, "raft-bench-")
	if err != nil {
		return fmt.Errorf("-dir: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	fs, err := fileSystem(dir)
	if err != nil {
		return err
	}
	if err := refuseMemory(fs, dir, o.allowTmpfs); err != nil {
		return err
	}
	runtime.GOMAXPROCS(o.procs)
	if o.cpuprofile != "" {
		stopProfile, err := startProfile(o.cpuprofile)
		if err != nil {
			return fmt.Errorf("-cpuprofile: %w", err)
		}
		defer func() { err = errors.Join(err, stopProfile()) }()
	}
	samples, err := runAll(ctx, o, dir, stderr)
	if err != nil {
		return err
	}
	res := result{
		Machine: machine{
			Go: runtime.Version(), OS: runtime.GOOS, Arch: runtime.GOARCH,
			CPUs: runtime.NumCPU(), GOMAXPROCS: o.procs, FileSystem: fs,
		},
		Args: args, Size: o.size, Interval: intervalMeaning,
		Rows: summarize(samples, o.systems, o.clients), Samples: samples,
	}
	if err := printTables(stdout, res); err != nil {
		return err
	}
	if o.json != "" {
		return writeJSON(o.json, res)
	}
	return nil
}

func startProfile(name string) (stop func() error, err error) {
	f, err := os.Create(name)
	if err != nil {
		return nil, err
	}
	if err := pprof.StartCPUProfile(f); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return func() error { pprof.StopCPUProfile(); return f.Close() }, nil
}

// runAll runs every system once per round, so that what the machine does
// meanwhile hits all of them alike.
func runAll(ctx context.Context, o options, dir string, progress io.Writer) ([]sample, error) {
	var samples []sample
	for _, n := range o.clients {
		for round := range o.rounds {
			for _, name := range order(o.systems, round) {
				sys, err := newSystem(name)
				if err != nil {
					return nil, err
				}
				data := filepath.Join(dir, fmt.Sprintf("%s-%d-%d", name, n, round))
				l := load{Clients: n, Size: o.size, Warmup: o.warmup, Measure: o.measure}
				s, err := runIn(ctx, sys, data, l)
				if err != nil {
					return nil, fmt.Errorf("%s, %d clients, round %d: %w", name, n, round+1, err)
				}
				s.System, s.Clients, s.Round = name, n, round
				samples = append(samples, s)
				fmt.Fprintf(progress, "%4d clients, round %d of %d: %-11s %8.0f/s\n", n, round+1, o.rounds, name, s.OpsPerSec)
			}
		}
	}
	return samples, nil
}

// order is the systems as given in even rounds and backwards in odd ones.
func order(systems []string, round int) []string {
	o := slices.Clone(systems)
	if round%2 == 1 {
		slices.Reverse(o)
	}
	return o
}

// runIn runs one round in a fresh directory and removes it.
func runIn(ctx context.Context, sys System, data string, l load) (s sample, err error) {
	if err := os.Mkdir(data, 0o755); err != nil {
		return sample{}, err
	}
	defer func() {
		err = errors.Join(err, os.RemoveAll(data))
		syscall.Sync() // The next system does not pay for this one's clean-up.
	}()
	return runRound(ctx, sys, data, l)
}

// The file systems that keep their files in memory, by their magic numbers,
// and the ones whose names are worth printing.
const (
	tmpfsMagic = 0x01021994
	ramfsMagic = 0x858458f6
)

// fileSystem names the file system that dir is on.
func fileSystem(dir string) (string, error) {
	var st syscall.Statfs_t
	if err := syscall.Statfs(dir, &st); err != nil {
		return "", fmt.Errorf("file system of %s: %w", dir, err)
	}
	switch magic := uint32(st.Type); magic {
	case tmpfsMagic:
		return "tmpfs", nil
	case ramfsMagic:
		return "ramfs", nil
	case 0xef53:
		return "ext4", nil
	case 0x58465342:
		return "xfs", nil
	case 0x9123683e:
		return "btrfs", nil
	case 0x794c7630:
		return "overlayfs", nil
	default:
		return fmt.Sprintf("file system %#x", magic), nil
	}
}

// refuseMemory is an error when fs keeps files in memory, unless allowed.
func refuseMemory(fs, dir string, allowed bool) error {
	if allowed || fs != "tmpfs" && fs != "ramfs" {
		return nil
	}
	return fmt.Errorf("%s is on %s, which lives in memory: a sync costs nothing there and every figure would be wrong; name a directory on a disk with -dir, or pass -allow-tmpfs to try things out", dir, fs)
}
