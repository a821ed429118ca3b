/* Pulls values beyond two limits back to them, in place. */
void winsorize(double *values, long count, double low, double high)
{
    for (long i = 0; i < count; i++) {
        if (values[i] < low) values[i] = low;
        if (values[i] > high) values[i] = high;
    }
}
