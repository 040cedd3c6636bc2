// Command chart draws what bench measured: throughput and latency over the
// number of clients, one line per system. README.md of bench says how to run it.
package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

func main() {
	err := run(os.Args[1:], os.Stdout, os.Stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
	case err != nil:
		fmt.Fprintln(os.Stderr, "chart:", err)
		os.Exit(1)
	}
}

func run(args []string, stdout, help io.Writer) error {
	f := flag.NewFlagSet("chart", flag.ContinueOnError)
	f.SetOutput(help)
	from := f.String("json", "", "a file that bench -json wrote")
	to := f.String("o", "", "the picture to write; its name ends in .svg or .png")
	if err := f.Parse(args); err != nil {
		return err
	}
	if *from == "" || *to == "" || f.NArg() > 0 {
		return errors.New("say what to draw and where to, for example: -json results.json -o throughput.svg")
	}
	format := strings.TrimPrefix(filepath.Ext(*to), ".")
	if format != "svg" && format != "png" {
		return fmt.Errorf("-o: %s ends in neither .svg nor .png", *to)
	}
	b, err := os.ReadFile(*from)
	if err != nil {
		return fmt.Errorf("-json: %w", err)
	}
	res, err := parse(b)
	if err != nil {
		return fmt.Errorf("-json: %s: %w", *from, err)
	}
	var picture bytes.Buffer // whole before it replaces an older one
	if err := paint(&picture, res, format); err != nil {
		return err
	}
	if err := os.WriteFile(*to, picture.Bytes(), 0o644); err != nil {
		return fmt.Errorf("-o: %w", err)
	}
	_, err = fmt.Fprintf(stdout, "%s: %d systems\n", *to, len(res.series()))
	return err
}

// result is the part of bench's -json file that is drawn.
type result struct {
	Machine struct {
		Go         string `json:"go"`
		CPUs       int    `json:"cpus"`
		GOMAXPROCS int    `json:"gomaxprocs"`
		FileSystem string `json:"file_system"`
	} `json:"machine"`
	Size    int      `json:"payload_bytes"`
	Rows    []row    `json:"rows"`
	Samples []sample `json:"samples"`
}

// row is one system at one number of clients, medians over the rounds.
type row struct {
	System    string  `json:"system"`
	Clients   int     `json:"clients"`
	Rounds    int     `json:"rounds"`
	OpsPerSec float64 `json:"ops_per_sec"`
	P50       float64 `json:"p50_ms"`
	P99       float64 `json:"p99_ms"`
}

// sample is one round.
type sample struct {
	System    string  `json:"system"`
	Clients   int     `json:"clients"`
	OpsPerSec float64 `json:"ops_per_sec"`
}

// parse reads a result. The scales are logarithmic, so it refuses a figure that
// is not positive.
func parse(b []byte) (result, error) {
	var res result
	if err := json.Unmarshal(b, &res); err != nil {
		return result{}, err
	}
	if len(res.Rows) == 0 {
		return result{}, errors.New("there are no rows in it; write it with bench -json")
	}
	for _, r := range res.Rows {
		if r.System == "" || min(float64(r.Clients), r.OpsPerSec, r.P50, r.P99) <= 0 {
			return result{}, fmt.Errorf("a row can't be drawn, because a figure in it is missing or 0: %+v", r)
		}
	}
	for _, s := range res.Samples {
		if s.OpsPerSec <= 0 {
			return result{}, fmt.Errorf("a round can't be drawn, because nothing was measured in it: %+v", s)
		}
	}
	return res, nil
}

// series is one system's line.
type series struct {
	system string
	points []point // by number of clients
}

// point is a row with the lowest and the highest round.
type point struct {
	row
	low, high float64
}

// series returns the lines in the order in which bench ran the systems.
func (res result) series() []series {
	var all []series
	for _, r := range res.Rows {
		i := slices.IndexFunc(all, func(s series) bool { return s.system == r.System })
		if i < 0 {
			i = len(all)
			all = append(all, series{system: r.System})
		}
		p := point{row: r, low: r.OpsPerSec, high: r.OpsPerSec}
		for _, s := range res.Samples {
			if s.System == r.System && s.Clients == r.Clients {
				p.low, p.high = min(p.low, s.OpsPerSec), max(p.high, s.OpsPerSec)
			}
		}
		all[i].points = append(all[i].points, p)
	}
	for _, s := range all {
		slices.SortFunc(s.points, func(a, b point) int { return cmp.Compare(a.Clients, b.Clients) })
	}
	return all
}

// clients returns every number of clients, in order.
func (res result) clients() []int {
	var n []int
	for _, r := range res.Rows {
		n = append(n, r.Clients)
	}
	slices.Sort(n)
	return slices.Compact(n)
}

const oneRound = "1 round"

// rounds says how many rounds the figures are medians of.
func (res result) rounds() string {
	low, high := res.Rows[0].Rounds, res.Rows[0].Rounds
	for _, r := range res.Rows {
		low, high = min(low, r.Rounds), max(high, r.Rounds)
	}
	switch {
	case low != high:
		return fmt.Sprintf("medians of %d to %d rounds", low, high)
	case low == 1:
		return oneRound
	}
	return fmt.Sprintf("medians of %d rounds", low)
}
