// Command reads measures linearizable reads: closed-loop clients call ReadIndex
// or ReadLease on the leader or on a follower and then look at its state
// machine, alone and beside writes. See the README of this module.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"runtime/pprof"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"example.com/raft"
	"example.com/raft/bench/cluster"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "reads:", err)
		os.Exit(1)
	}
}

type options struct {
	clients, writers, rounds int
	seconds, warmup          time.Duration
	procs                    []int
	cases                    []string
	dir, json, profile       string
}

// The reference: rounds without Raft.
const loopName = "loop"

// caseNames are what can be measured: where, how, and beside what.
func caseNames() []string {
	names := []string{loopName}
	for _, how := range []string{"index", "lease"} {
		for _, where := range []string{"leader", "follower"} {
			for _, beside := range []string{"alone", "writes"} {
				names = append(names, how+"/"+where+"/"+beside)
			}
		}
	}
	return names
}

func parse(args []string, help io.Writer) (options, error) {
	var o options
	var procs, cases string
	f := flag.NewFlagSet("reads", flag.ContinueOnError)
	f.SetOutput(help)
	f.IntVar(&o.clients, "clients", 256, "closed-loop clients that read")
	f.IntVar(&o.writers, "writers", 16, "closed-loop clients that write on the leader, where there are writes")
	f.IntVar(&o.rounds, "rounds", 9, "rounds; each runs every case once")
	f.DurationVar(&o.seconds, "time", time.Second, "measured in each round and case")
	f.DurationVar(&o.warmup, "warmup", 200*time.Millisecond, "driven before that and not counted")
	f.StringVar(&procs, "procs", "8,2", "values of GOMAXPROCS, one table each")
	f.StringVar(&cases, "cases", strings.Join(caseNames(), ","), "what to measure")
	f.StringVar(&o.dir, "dir", "", "where the data goes, on a disk (default: the current directory)")
	f.StringVar(&o.json, "json", "", "also write every round's figures to this file")
	f.StringVar(&o.profile, "cpuprofile", "", "write a CPU profile of everything that runs to this file")
	if err := f.Parse(args); err != nil {
		return o, err
	}
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if f.NArg() > 0 {
		bad("unexpected argument %q; every setting is a flag, see -h", f.Arg(0))
	}
	for field := range strings.SplitSeq(procs, ",") {
		n, err := strconv.Atoi(field)
		if err != nil || n < 1 {
			bad("-procs: %q is no value of GOMAXPROCS; write, for example, 8,2", field)
		}
		o.procs = append(o.procs, n)
	}
	for name := range strings.SplitSeq(cases, ",") {
		if !slices.Contains(caseNames(), name) {
			bad("-cases: %q is none of %v", name, caseNames())
		}
		o.cases = append(o.cases, name)
	}
	if o.clients < 1 || o.writers < 1 || o.rounds < 1 || o.seconds <= 0 || o.warmup < 0 {
		bad("-clients, -writers, -rounds and -time must be more than 0, and -warmup not less")
	}
	return o, errors.Join(errs...)
}

func run(ctx context.Context, args []string, stdout, progress io.Writer) (err error) {
	o, err := parse(args, progress)
	if err != nil {
		return err
	}
	if o.profile != "" {
		f, err := os.Create(o.profile)
		if err != nil {
			return fmt.Errorf("-cpuprofile: %w", err)
		}
		defer f.Close()
		if err := pprof.StartCPUProfile(f); err != nil {
			return fmt.Errorf("-cpuprofile: %w", err)
		}
		defer pprof.StopCPUProfile()
	}
	var samples []sample
	for _, procs := range o.procs {
		s, err := runProcs(ctx, o, procs, progress)
		if err != nil {
			return err
		}
		samples = append(samples, s...)
		if err := printTable(stdout, o, procs, s); err != nil {
			return err
		}
	}
	if o.json == "" {
		return nil
	}
	b, err := json.MarshalIndent(samples, "", "\t")
	if err != nil {
		return err
	}
	return os.WriteFile(o.json, append(b, '\n'), 0o644)
}

// runProcs runs all rounds with one value of GOMAXPROCS, on one cluster. What
// the machine does meanwhile hits all cases of a round alike.
func runProcs(ctx context.Context, o options, procs int, progress io.Writer) (samples []sample, err error) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(procs))
	dir, remove, err := cluster.TempDir(o.dir)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, remove()) }()
	c, err := cluster.Start(ctx, dir, func(_ int, c *raft.Config) { c.LeaseDuration = time.Second })
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, c.Stop()) }()
	leader, err := c.Leader(ctx)
	if err != nil {
		return nil, err
	}
	ref, err := newLoop()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, ref.stop()) }()
	for round := range o.rounds {
		cases := slices.Clone(o.cases)
		if round%2 == 1 {
			slices.Reverse(cases)
		}
		for _, name := range cases {
			b := &bout{reads: ref.read}
			if how, rest, ok := strings.Cut(name, "/"); ok {
				b.reads, b.writes = readsOf(c, leader, how, rest)
			}
			s, err := b.run(ctx, o)
			if err != nil {
				return nil, fmt.Errorf("%s, round %d: %w", name, round+1, err)
			}
			s.Case, s.Round, s.Procs = name, round, procs
			samples = append(samples, s)
			fmt.Fprintf(progress, "GOMAXPROCS %d, round %d of %d: %-22s %9.0f/s\n", procs, round+1, o.rounds, name, s.PerSec)
		}
		if c.Servers[leader].Status().Role != raft.Leader {
			return nil, fmt.Errorf("leadership moved in round %d, so leader and follower were mixed up; run it again on a quieter machine", round+1)
		}
	}
	return samples, nil
}

func median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}

func spread(v []float64, format string) string {
	return fmt.Sprintf(format+" ["+format+", "+format+"]", median(v), slices.Min(v), slices.Max(v))
}

func printTable(w io.Writer, o options, procs int, samples []sample) error {
	fmt.Fprintf(w, "\n%s, %d CPUs, GOMAXPROCS %d, %d clients that read, %d that write, %d rounds of %v: median [lowest, highest]\n",
		runtime.Version(), runtime.NumCPU(), procs, o.clients, o.writers, o.rounds, o.seconds)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "case\treads/s\tof loop\tp50 ms\tp99 ms\tCPU us/read\tallocs/read\twrites/s\t")
	loop := map[int]float64{} // by round
	for _, s := range samples {
		if s.Case == loopName {
			loop[s.Round] = s.PerSec
		}
	}
	for _, name := range o.cases {
		var perSec, share, p50, p99, cpu, allocs, writes []float64
		for _, s := range samples {
			if s.Case != name {
				continue
			}
			perSec, p50, p99 = append(perSec, s.PerSec), append(p50, s.P50), append(p99, s.P99)
			cpu, allocs, writes = append(cpu, s.CPUMicros), append(allocs, s.Allocs), append(writes, s.WritesPerSec)
			if l := loop[s.Round]; l > 0 {
				share = append(share, s.PerSec/l)
			}
		}
		of := "-"
		if len(share) > 0 {
			of = spread(share, "%.2f")
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%.2f\t%.2f\t%.2f\t%.2f\t%.0f\t\n",
			name, spread(perSec, "%.0f"), of, median(p50), median(p99), median(cpu), median(allocs), median(writes))
	}
	return t.Flush()
}
